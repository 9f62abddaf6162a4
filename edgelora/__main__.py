from edgelora.cli.main import main

main()
