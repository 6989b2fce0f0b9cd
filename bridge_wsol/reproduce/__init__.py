"""What the paper is compared with, and what it shows: compared systems, drawn birds, tables, figures."""
