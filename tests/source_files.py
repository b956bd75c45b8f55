"""Documents out of files that tests write, under limits that small files reach."""

from fastllm.data.sources import Limits, SourceEntry, read
from fastllm.data.sources.plan import format_of

SMALL = Limits(document=1 << 16, ratio=50, free=1 << 18)


def documents(path, limits=SMALL, **options):
    entry = SourceEntry(str(path), path.name, format_of(path.name), path.stat().st_size if path.exists() else 0)
    return list(read(entry, limits, **options))
