package carrier

import (
	"bytes"
	"testing"
	"time"
)

// TestProbe: what one end seals the other opens, and nobody else's.
func TestProbe(t *testing.T) {
	secret := NewSecret()
	k := newProbeKeys(secret)
	p := probe{size: 1452, seq: 1<<40 + 5, answer: 77, next: 500 * time.Millisecond}
	b := k.seal(fromSession, p)
	if len(b) != p.size || !isProbe(b) || isData(b) {
		t.Fatalf("%d bytes, probe %v, data %v", len(b), isProbe(b), isData(b))
	}
	if got, ok := newProbeKeys(secret).open(fromSession, b); !ok || got != p {
		t.Errorf("opened %+v, %v", got, ok)
	}
	if _, ok := k.open(fromAgent, b); ok {
		t.Error("a session's probe passes for an agent's")
	}
	reflected := bytes.Clone(b)
	reflected[5] = fromAgent
	if _, ok := k.open(fromAgent, reflected); ok {
		t.Error("a session's probe with its kind changed passes for an agent's")
	}
	if _, ok := newProbeKeys(NewSecret()).open(fromSession, b); ok {
		t.Error("a probe of another secret opens")
	}
	for _, n := range []int{0, 4, probeBody, probeLen - 1, probeLen, len(b) - 1} {
		if _, ok := k.open(fromSession, b[:n]); ok {
			t.Errorf("a probe cut to %d bytes opens", n)
		}
	}
	for i := range probeLen {
		forged := bytes.Clone(b)
		forged[i] ^= 1
		if _, ok := k.open(fromSession, forged); ok {
			t.Errorf("opens with byte %d changed", i)
		}
	}
	if _, ok := k.open(fromSession, append(b, 0)); ok {
		t.Error("a longer one opens")
	}
}

func FuzzProbe(f *testing.F) {
	k := newProbeKeys(bytes.Repeat([]byte{1}, SecretLen))
	f.Add(k.seal(fromSession, probe{size: 100, seq: 1}))
	f.Fuzz(func(t *testing.T, b []byte) {
		if p, ok := newProbeKeys(NewSecret()).open(fromSession, b); ok {
			t.Fatalf("%+v was opened with a secret that nobody knows", p)
		}
	})
}
