"""The processes of a run, and the lines between them: who they are, how they meet, what they agree on."""
