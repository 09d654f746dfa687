// Anthropic's TypeScript package: whole, streamed, a tool and its result, counting, errors.
// Needs a chat model.
import assert from 'node:assert'
import Anthropic from '@anthropic-ai/sdk'

const model = process.env.MODEL
const client = new Anthropic()
const messages = [{ role: 'user', content: 'Name the capital of France.' }]
const asked = { model, max_tokens: 60, temperature: 0 }
const whole = await client.messages.create({ ...asked, messages })
const stream = client.messages.stream({ ...asked, messages })
let text = ''
stream.on('text', piece => { text += piece })
const final = await stream.finalMessage()
assert.equal(text, whole.content[0].text)
assert.deepEqual(final.content, whole.content)
console.log('whole and streamed:', text, final.usage.output_tokens, 'tokens')

const tools = [{ name: 'weather', description: 'The weather of a city', input_schema: { type: 'object', properties: { city: { type: 'string' } }, required: ['city'] } }]
const turns = [{ role: 'user', content: 'What is the weather in Oslo?' }]
const called = await client.messages.stream({ ...asked, messages: turns, tools, tool_choice: { type: 'any' } }).finalMessage()
assert.equal(called.stop_reason, 'tool_use')
const uses = called.content.filter(block => block.type === 'tool_use')
console.log('tool, streamed:', uses[0].name, uses[0].input)
turns.push({ role: 'assistant', content: called.content }, { role: 'user', content: uses.map(use => ({ type: 'tool_result', tool_use_id: use.id, content: 'Rain, 4 degrees.' })) })
const after = await client.messages.create({ ...asked, messages: turns })
console.log('after the tool:', after.content[0].text.slice(0, 80))
console.log('counted:', (await client.messages.countTokens({ model, messages })).input_tokens)
await assert.rejects(client.messages.create({ ...asked, model: 'another', messages }), Anthropic.NotFoundError)
console.log('an unknown model is a NotFoundError')
