"""What run folders say: tables, plots and pages made from their JSON. Nothing here needs torch."""
