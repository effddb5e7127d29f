"""Preparation: from source documents to the files of a corpus, in parts that survive a kill."""
