"""What each kernel is worth: static proofs without a GPU, timings with one. Installed as fastllm.bench.

``bench/<op>.py`` holds what is peculiar to one op: ``shapes``, a dict from the name of a real shape to
``make(device, dtype)``, which returns the :class:`~fastllm.registry.Sample` of that call, in the order of what
they tell; and ``rivals``, if there are any, a dict from a name to what imports that rival and returns a function that
takes the op's arguments. Everything else iterates over the registry.
"""
