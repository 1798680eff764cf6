"""Other people's tools, run on compressed contexts. Each module needs the tool that it is named after."""
