"""What runs inside Redis, and the keys it runs on.

    PREFIX:state      hash    epoch, sequence
    PREFIX:aliases    hash    tenant US adapter_id           -> digest SP sequence SP at
    PREFIX:versions   hash    digest                         -> record, JSON
    PREFIX:former     hash    tenant US adapter_id US digest -> sequence SP at
    PREFIX:releases   zset    tenant US adapter_id US digest by the time the id stopped pointing to it
    PREFIX:changes    stream  SEQUENCE-0                     -> key, digest (empty: removed), at

US is the character 31, which no tenant and no id holds. An epoch is the life of one set of keys: whoever makes them
again from the manifest on disk gives them another one.
"""

from dataclasses import dataclass

SEPARATOR = "\x1f"

# Compare-and-set of one id; an empty digest removes it.
# KEYS  state, aliases, versions, former, releases, changes
# ARGV  epoch and newest sequence that the caller knows of, the id's key, digest, expected digest ("*" for any),
#       now in seconds, entries that the stream keeps
# Gives {"stale"} when these keys are not those the caller knows, {"unknown"} for a version that is not there,
# {"wrong", digest now}, {"same"}, or {"done", sequence, digest before}.
# The first write is the one that Redis refuses when it is full, so there is no half of a change.
CHANGE = """
local state = redis.call('HMGET', KEYS[1], 'epoch', 'sequence')
if state[1] ~= ARGV[1] or tonumber(state[2]) < tonumber(ARGV[2]) then return {'stale'} end
local value = redis.call('HGET', KEYS[2], ARGV[3])
local current, rest = '', ''
if value then current, rest = string.match(value, '^(%x+) (.+)$') end
if ARGV[5] ~= '*' and ARGV[5] ~= current then return {'wrong', current} end
if ARGV[4] == '' and current == '' then return {'wrong', ''} end
if ARGV[4] == current then return {'same'} end
if ARGV[4] ~= '' and redis.call('HEXISTS', KEYS[3], ARGV[4]) == 0 then return {'unknown'} end
local sequence = string.format('%d', redis.call('HINCRBY', KEYS[1], 'sequence', 1))
if value then
  local held = ARGV[3] .. '\\31' .. current
  redis.call('HSET', KEYS[4], held, rest)
  redis.call('ZADD', KEYS[5], ARGV[6], held)
end
if ARGV[4] == '' then
  redis.call('HDEL', KEYS[2], ARGV[3])
else
  redis.call('HSET', KEYS[2], ARGV[3], ARGV[4] .. ' ' .. sequence .. ' ' .. ARGV[6])
  local again = ARGV[3] .. '\\31' .. ARGV[4]
  redis.call('HDEL', KEYS[4], again)
  redis.call('ZREM', KEYS[5], again)
end
redis.call('XADD', KEYS[6], 'MAXLEN', '~', ARGV[7], sequence .. '-0', 'key', ARGV[3], 'digest', ARGV[4], 'at', ARGV[6])
return {'done', sequence, current}
"""

# Ends the holds that ended in time.
# KEYS  former, releases
# ARGV  seconds since the Unix epoch
RELEASE = """
local over = redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', ARGV[1], 'LIMIT', 0, 1000)
for _, held in ipairs(over) do
  redis.call('HDEL', KEYS[1], held)
  redis.call('ZREM', KEYS[2], held)
end
return #over
"""

# Removes a version if nothing changed since the caller saw that nobody holds it.
# KEYS  state, versions
# ARGV  epoch, sequence, digest
FORGET = """
local state = redis.call('HMGET', KEYS[1], 'epoch', 'sequence')
if state[1] ~= ARGV[1] or state[2] ~= ARGV[2] then return 0 end
redis.call('HDEL', KEYS[2], ARGV[3])
return 1
"""

# Puts keys made from the manifest in place of those that are gone or too old, unless somebody else was faster.
# KEYS  state, aliases, versions, former, releases, changes, then the four new ones in the order of the old
# ARGV  epoch and sequence that the caller saw in the state, empty when there was none; the new epoch and sequence
INSTALL = """
local state = redis.call('HMGET', KEYS[1], 'epoch', 'sequence')
if (state[1] or '') ~= ARGV[1] or (state[2] or '') ~= ARGV[2] then return 0 end
redis.call('DEL', KEYS[6])
for i = 2, 5 do
  redis.call('DEL', KEYS[i])
  if redis.call('EXISTS', KEYS[i + 5]) == 1 then
    redis.call('RENAME', KEYS[i + 5], KEYS[i])
    redis.call('PERSIST', KEYS[i])
  end
end
redis.call('HSET', KEYS[1], 'epoch', ARGV[3], 'sequence', ARGV[4])
return 1
"""


@dataclass(frozen=True, slots=True)
class Keys:
    """The names above, under one prefix."""

    prefix: str

    def __getitem__(self, name: str) -> str:
        return f"{self.prefix}:{name}"

    def of(self, *names: str) -> list[str]:
        return [self[name] for name in names]


def id_key(tenant: str, adapter_id: str) -> str:
    return f"{tenant}{SEPARATOR}{adapter_id}"
