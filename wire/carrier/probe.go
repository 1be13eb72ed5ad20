package carrier

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"time"
)

// UDPPort is the UDP port of its pod on which the agent takes WireGuard messages
// from its session. It opens once a session was introduced that has FeatureUDP,
// and answers nobody else.
const UDPPort = 7534

// A probe is a datagram beside WireGuard's, by which both ends find out whether
// UDP works between them, and how long its datagrams may be:
//
//	0   "\xc7cvp"  no WireGuard message begins so: theirs begin with 1 to 4
//	4   version of this layout
//	5   kind: of the session, or the agent's answer
//	6   length of the datagram, 16 bits, big endian as all
//	8   number of the probe, 64 bits: each is higher than the one before
//	16  number of an answer, 64 bits: in an answer its own, in a probe the newest
//	    one that was heard, which tells the agent that it is heard
//	24  milliseconds until the next probe, 32 bits
//	28  0
//	32  HMAC-SHA256 of all before it
//	64  nothing that matters, up to the length: that the path takes so much
//
// An answer is exactly as long as what it answers, so that nobody can make the
// agent send more than he sent himself.
const (
	probeMagic   = "\xc7cvp"
	probeVersion = 1
	probeBody    = 32
	probeLen     = probeBody + sha256.Size

	fromSession = 1
	fromAgent   = 2
)

// The two ends' keys differ, so that no probe can be sent back to its maker.
const (
	keyOfSession = "culvert udp 1, session\x00"
	keyOfAgent   = "culvert udp 1, agent\x00"
)

type probe struct {
	size   int
	seq    uint64
	answer uint64
	next   time.Duration // only of a session's probe
}

// probeKeys seal and open the probes of one secret.
type probeKeys struct{ session, agent []byte }

func newProbeKeys(secret []byte) *probeKeys {
	derive := func(of string) []byte {
		h := hmac.New(sha256.New, secret)
		h.Write([]byte(of))
		return h.Sum(nil)
	}
	return &probeKeys{session: derive(keyOfSession), agent: derive(keyOfAgent)}
}

func (k *probeKeys) of(kind byte) []byte {
	if kind == fromSession {
		return k.session
	}
	return k.agent
}

func sealed(key, body []byte) []byte {
	h := hmac.New(sha256.New, key)
	h.Write(body)
	return h.Sum(nil)
}

// seal makes the datagram of p.
func (k *probeKeys) seal(kind byte, p probe) []byte {
	b := make([]byte, p.size)
	copy(b, probeMagic)
	b[4], b[5] = probeVersion, kind
	binary.BigEndian.PutUint16(b[6:], uint16(p.size))
	binary.BigEndian.PutUint64(b[8:], p.seq)
	binary.BigEndian.PutUint64(b[16:], p.answer)
	binary.BigEndian.PutUint32(b[24:], uint32(p.next/time.Millisecond))
	copy(b[probeBody:], sealed(k.of(kind), b[:probeBody]))
	return b
}

// open reads a datagram that must be a probe of the kind, made with this secret.
func (k *probeKeys) open(kind byte, b []byte) (p probe, ok bool) {
	if len(b) < probeLen || !isProbe(b) || b[4] != probeVersion || b[5] != kind ||
		int(binary.BigEndian.Uint16(b[6:])) != len(b) ||
		!hmac.Equal(b[probeBody:probeLen], sealed(k.of(kind), b[:probeBody])) {
		return p, false
	}
	return probe{
		size: len(b), seq: binary.BigEndian.Uint64(b[8:]), answer: binary.BigEndian.Uint64(b[16:]),
		next: time.Duration(binary.BigEndian.Uint32(b[24:])) * time.Millisecond,
	}, true
}

// isProbe tells a probe from WireGuard's messages.
func isProbe(b []byte) bool {
	return len(b) >= len(probeMagic) && string(b[:len(probeMagic)]) == probeMagic
}
