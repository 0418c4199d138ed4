"""Exact search over validation tables and cost tables, and a promise on what it finds; needs no model and no torch.

``objective`` and ``grid`` say what can be asked for and what is tried, ``optima`` and ``anytime`` find the answer,
``exact`` proves it, ``cross_fitting`` tightens limits until they hold on new images, ``guarantee`` certifies what is
found on images not seen, ``answers`` and ``findings`` hold the records, and ``words`` their English.
"""
