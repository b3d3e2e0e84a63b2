from examples.cabin.cabin import main

main()
