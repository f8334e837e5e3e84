"""Declared metrics, streamed accumulators, intervals and the measurements that several questions share."""
