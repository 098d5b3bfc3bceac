"""The variables of a strategy: replicated or sharded."""
