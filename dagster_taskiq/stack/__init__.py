"""What a command starts on this machine and stops again, with nothing left: see ``processes``.

``signals`` that end it, and ``homes``, the temporary DAGSTER_HOME in which it may run.
"""
