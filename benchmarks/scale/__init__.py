"""What a large deployment costs: measured on a small one, simulated, and computed from both.

``measure`` counts what one real step, worker and run cost each server; ``simulate`` and ``knee``
put the lease and control traffic of a crowd of workers on a Redis of its own; ``model`` computes
from their figures what 100, 1,000 and 10,000 slots need, and ``tables`` writes that into
``docs/scaling.md``.
"""
