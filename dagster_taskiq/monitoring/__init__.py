"""What monitoring systems read of workers and queues; each part needs an optional extra."""
