"""Graph passes of lowrank_fx, one rewrite per file; the order they run in is in ``order.py``.

This folder ships as ``lowrank_fx.passes``. Importing it under the bare name would give every class a second identity,
so that is refused.
"""

if __name__ != "lowrank_fx.passes":
    raise ImportError(
        f"the passes of lowrank_fx were imported as {__name__!r}; import them as 'lowrank_fx.passes' "
        "(the folder at the top of the repository is only where they live)"
    )
