from survival.runner import main

main()
