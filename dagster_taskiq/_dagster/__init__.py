"""Every private name of Dagster that this package uses.

A release of Dagster that moves or changes one of them breaks this package and nothing else. Names
are re-exported as they are where that serves; where Dagster offers an awkward shape, a function
here gives it a plain one.
"""
