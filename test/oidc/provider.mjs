// An OpenID provider for tests: oidc-provider with what the first line of standard input says, over
// TLS on the loopback address. It prints its port when it listens, and ends with its standard input.
import { createServer } from 'node:https';
import { createInterface } from 'node:readline';
import { pathToFileURL } from 'node:url';
import { webcrypto } from 'node:crypto';

// What Debian 12's Node has under another name, or not.
globalThis.crypto ??= webcrypto;
URL.parse ??= (...parts) => { try { return new URL(...parts); } catch { return null; } };

const lines = createInterface({ input: process.stdin });
lines.on('close', () => process.exit(0));
const given = await new Promise((resolve) => lines.once('line', (line) => resolve(JSON.parse(line))));
const { default: Provider } = await import(pathToFileURL(process.argv[2]));

const server = createServer({ cert: given.certificate, key: given.key });
await new Promise((resolve) => server.listen(given.port, given.address, resolve));
const { port } = server.address();

const claimsOf = (id) => given.accounts?.[id] ?? {};
const provider = new Provider(`https://${given.address}:${port}`, {
  jwks: given.keys,
  clients: given.clients,
  cookies: { keys: ['of no worth'] },
  pkce: { required: () => true },
  scopes: ['openid', 'offline_access', 'api'],
  claims: { openid: ['sub'], groups: null, email: null, profile: ['groups', 'email'] },
  conformIdTokenClaims: false,
  clientDefaults: { id_token_signed_response_alg: given.algorithm },
  ttl: { AccessToken: given.ttl, ClientCredentials: given.ttl, IdToken: given.ttl, Session: 3600, Grant: 3600, Interaction: 600 },
  features: {
    devInteractions: { enabled: true },
    deviceFlow: { enabled: true },
    revocation: { enabled: true },
    clientCredentials: { enabled: true },
    rpInitiatedLogout: { enabled: true },
    resourceIndicators: {
      enabled: true,
      defaultResource: () => given.resource,
      useGrantedResource: () => true,
      getResourceServerInfo: (ctx, resource) => ({
        scope: 'api', audience: resource, accessTokenFormat: 'jwt', accessTokenTTL: given.ttl,
        jwt: { sign: { alg: given.algorithm } },
      }),
    },
  },
  extraTokenClaims: (ctx, token) => claimsOf(token.accountId ?? token.clientId),
  findAccount: (ctx, id) => ({ accountId: id, claims: () => ({ sub: id, ...claimsOf(id) }) }),
});
provider.on('server_error', (ctx, err) => console.error(err));
server.on('request', provider.callback());
console.log(port);
