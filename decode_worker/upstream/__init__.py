"""Workers of role "engine": another server computes the tokens, by HTTP. docs/engines.md.

dialects.py   what to ask each kind of server for, and where its token ids are
texts.py      text of servers that know no ids, as ids of the model
answer.py     one run: its tokens as they come, its end, what may be wrong with them
survey.py     what serves at the URL, and whether it fits the model
health.py     when the worker is paused, and when the upstream is checked
node.py       the Node
http.py       the sockets; the only file with any
events.py     server-sent events out of bytes
options.py    the command's options
process.py    the process: options, upstream and node put together
"""
