"""The bundled demo suite: seeded task generators and the program that trains and writes it."""
