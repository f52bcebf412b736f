"""The run directory: attempts ledger, metrics, rollout samples. Knows no algorithm."""
