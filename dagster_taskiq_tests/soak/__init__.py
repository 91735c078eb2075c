"""The soak: mixed jobs on workers, while faults strike at random.

``python -m dagster_taskiq_tests.soak --broker redis --seconds 600`` runs it; ``docs/soak.md`` says
what it does and what came of it.

===========  ====================================================================
module       holds
===========  ====================================================================
``jobs``     the jobs, whose ops note every attempt in the trace
``stack``    servers, DAGSTER_HOME, workers
``runs``     starting runs, and Dagster's run monitoring
``faults``   what can go wrong
``director`` the clock: what happens when
``evidence`` what the trace, the logs and the servers say: which promise was broken
``soak``     one soak from its beginning to its figures
``report``   the figures, as a table and as JSON
===========  ====================================================================
"""
