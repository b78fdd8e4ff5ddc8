"""The dashboard's entry: hands over to the shell."""

from ui import shell

shell.run()
