"""Measurements that README and docs/results.md quote."""
