"""Rules that turn evidence rows into verdicts, as registered and as corrected, and the ledger of all verdicts.
It reads tables and measures nothing.
"""
