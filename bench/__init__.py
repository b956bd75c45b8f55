"""What each kernel is worth: static proofs without a GPU, timings with one. Installed as fastllm.bench.

``bench/<op>.py`` holds what is peculiar to one op: ``shapes``, a dict from the name of a real shape to
``make(device, dtype)``, which returns the :class:`~fastllm.registry.Sample` of that call. Everything else iterates
over the registry.
"""
