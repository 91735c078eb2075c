"""``dagster-taskiq demo``: a whole stack on one machine for ten seconds.

``jobs`` is the job, and what ``example/`` deploys; ``run`` is the order of events; ``processes``,
``progress`` and ``display`` are its tools.
"""
