"""Launch settings that were measured to be faster than the launchers' own rules: ``fastllm bench --tune OP`` writes it.

(kernel, architecture, what the launcher decides by) -> settings. Where nothing is listed, the rules hold.
"""

TUNED: dict[tuple, dict[str, int]] = {}
