"""A web page of what waits and runs: ``dagster-taskiq dashboard``.

It shows the read model of ``overview``, as the commands do, and orders workers about where it was
started with ``--allow-actions``. What it shows may have been written by anybody who can write to
the servers, so every text is escaped, and none is a link or a script.
"""
