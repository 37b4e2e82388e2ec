"""From a call to the replica that answers it: router, targets, idempotency."""
