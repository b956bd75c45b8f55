"""A folder per family of ops. `fastllm.functional` and `fastllm.nn` import them, which fills the registry."""
