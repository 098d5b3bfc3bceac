"""The worker processes of a run and their connections: who they are, how they meet, and what they agree on."""
