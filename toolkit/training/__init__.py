"""Train a run: ``RunContext``, ``build_phase`` → ``PhaseState``, ``Trainer``, the step."""
