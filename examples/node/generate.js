// A streamed answer from Node. Start a fleet (`make run`), then in this folder:
//   npm install --no-package-lock
//   node generate.js 127.0.0.1:50051 reverse "streams>"

import { fileURLToPath } from 'node:url';
import grpc from '@grpc/grpc-js';
import protoLoader from '@grpc/proto-loader';

const [address, adapterId, text] = process.argv.slice(2);
if (text === undefined) {
  console.error('usage: node generate.js HOST:PORT ADAPTER PROMPT');
  process.exit(2);
}

const protos = fileURLToPath(new URL('../../protos', import.meta.url));
const definition = protoLoader.loadSync('loraplex/v1/gateway.proto', {
  includeDirs: [protos],
  keepCase: true, // adapter_id, not adapterId
  longs: String, // a seed has 64 bits
  enums: String,
  defaults: true, // '' for a text that is empty
});
const { GatewayService } = grpc.loadPackageDefinition(definition).loraplex.v1;

const client = new GatewayService(address, grpc.credentials.createInsecure());
const request = {
  adapter_id: adapterId,
  text,
  sampling: { temperature: 0 },
  stopping: { max_tokens: 64 },
};

const call = client.GenerateStream(request, { deadline: Date.now() + 60_000 });
call.on('data', (response) => {
  for (const output of response.outputs) process.stdout.write(output.text);
  if (response.usage) process.stdout.write(`\n${response.usage.completion_tokens} tokens\n`);
});
call.on('error', (error) => {
  // `code` says whether to try again, `details` is a sentence for a developer.
  console.error(`refused: ${grpc.status[error.code]}: ${error.details}`);
  process.exitCode = 1;
  client.close();
});
call.on('end', () => client.close());
