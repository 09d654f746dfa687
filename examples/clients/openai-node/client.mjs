// OpenAI's TypeScript package: whole, streamed, parse by zod, tools run to the end, Responses, embeddings.
// Needs a chat model.
import assert from 'node:assert'
import OpenAI from 'openai'
import { zodResponseFormat, zodTextFormat } from 'openai/helpers/zod'
import { z } from 'zod'

const model = process.env.MODEL
const client = new OpenAI()
const messages = [{ role: 'user', content: 'Name the capital of France.' }]
const asked = { model, messages, temperature: 0, max_tokens: 60 }

const whole = await client.chat.completions.create(asked)
const text = whole.choices[0].message.content
let streamed = ''
for await (const chunk of await client.chat.completions.create({ ...asked, stream: true }))
  streamed += chunk.choices[0]?.delta?.content ?? ''
assert.equal(streamed, text)
console.log('chat:', text, '(streamed: the same)')

const City = z.object({ name: z.string(), country: z.string() })
const parsed = await client.chat.completions.parse({ ...asked, response_format: zodResponseFormat(City, 'city') })
console.log('parse:', City.parse(parsed.choices[0].message.parsed))

const calls = []
const runner = client.chat.completions.runTools({
  model, temperature: 0, max_tokens: 60, stream: true,
  messages: [{ role: 'user', content: 'What is the weather in Oslo?' }],
  tool_choice: { type: 'function', function: { name: 'weather' } },
  tools: [{ type: 'function', function: {
    name: 'weather', description: 'The weather of a city', parse: JSON.parse,
    parameters: { type: 'object', properties: { city: { type: 'string' } }, required: ['city'] },
    function: ({ city }) => { calls.push(city); return `Rain in ${city}, 4 degrees.` },
  } }],
}, { maxChatCompletions: 2 })
await runner.done()
assert(calls.length > 0)
console.log('runTools:', calls)

const response = await client.responses.create({ model, input: messages[0].content, temperature: 0 })
assert.equal(response.output_text, text)
const events = []
for await (const event of await client.responses.create({ model, input: 'And of Italy?', previous_response_id: response.id, temperature: 0, stream: true }))
  events.push(event.type)
assert.equal(events.at(-1), 'response.completed')
const shaped = await client.responses.parse({ model, input: messages[0].content, temperature: 0, text: { format: zodTextFormat(City, 'city') } })
console.log('Responses:', events.length, 'events;', City.parse(shaped.output_parsed))

const vectors = await client.embeddings.create({ model, input: ['a cat', 'a dog'] })
console.log('embeddings:', vectors.data.length, 'of', vectors.data[0].embedding.length)
await assert.rejects(client.chat.completions.create({ ...asked, temperature: 3 }), OpenAI.BadRequestError)
const leaving = new AbortController()
const long = await client.completions.create({ model, prompt: 'Once', max_tokens: 2000, stream: true }, { signal: leaving.signal })
for await (const _ of long) { leaving.abort(); break }
console.log('an error is a BadRequestError; a stream can be left')
