"""``dagster-taskiq dev``: Dagster, a worker, the launcher and the embedded server in one command.

``run`` is the order of events; ``home``, the DAGSTER_HOME that serves; ``logs``, what is printed;
``checks``, what is looked at before anything is started.
"""
