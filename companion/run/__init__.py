"""The command line: settings, the runner of notebooks, what is up to date, and work shared among machines.
Nothing else imports it.
"""
