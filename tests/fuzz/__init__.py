"""Every reader fed with damaged and forged files: it returns or raises DoraExportError.

``make fuzz`` runs for minutes (``python -m tests.fuzz --help``), ``tests/fuzz/test_fuzz.py`` a
fixed, bounded part of the same in ``make test``. Seeds are in ``corpus`` (``make_corpus.py`` makes
them); what once broke a reader is kept in ``found`` and replayed.
"""
