"""What each kernel is worth: static proofs without a GPU, timings with one. Installed as fastllm.bench.

``bench/<op>.py`` holds what is peculiar to one op; everything else iterates over the registry:

- ``shapes``: a dict from the name of a real shape to ``make(device, dtype)``, which returns the
  :class:`~fastllm.registry.Sample` of that call, in the order of what they tell;
- ``rivals``, if there are any: a dict from a name to what imports that rival and returns a function that takes the
  op's arguments; for what it lacks, that function raises NotImplementedError;
- ``sweep``, if there is one: the name of an axis, and a dict from its sizes to such calls, for plots over it;
- ``reference``, where real shapes need one: the op's own in less memory.
"""
