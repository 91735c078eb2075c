"""What fails around the product, and what it makes of it."""

#: Which fault is built into a worker, or into the code that it loads.
FAULT_VARIABLE = "DAGSTER_TASKIQ_TEST_FAULT"
