"""Training experiments. ``train.py`` is the main job, ``reproduce.py`` runs those of the papers."""
