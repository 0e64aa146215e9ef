"""What the routers of a trained model do while it draws: counts, the papers' figures, a page.

``python -m dit_models.analyze RUN_OR_FOLDER --out FOLDER``
"""
