package wire

import (
	"errors"
	"net"
	"os"
	"syscall"
	"testing"
	"time"

	"github.com/culvert-dev/culvert/wire/carrier"
)

// replaceFar puts another machine with the same addresses in the far one's place.
func (r *rig) replaceFar(t *testing.T) {
	t.Helper()
	r.farTunnel.Close()
	r.far, r.farBind = newNamespace(t), carrier.NewBind(carrier.BindConfig{})
	key := NewPrivateKey()
	var err error
	r.farTunnel, err = New(Config{Device: newFar(r.far.device(t, farAddrs, nearAddrs), true), PrivateKey: key, Bind: r.farBind, Passive: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.farTunnel.Close)
	r.dial(t)
	if err := errors.Join(r.farTunnel.SetPeer(r.nearKey.Public(), everyone), r.nearTunnel.SetPeer(key.Public(), everyone)); err != nil {
		t.Fatal(err)
	}
}

// Connections of a far end that is gone are reset although nobody sends in them;
// those of the one that is there live on.
func TestChallenge(t *testing.T) {
	r := newRig(t, true)
	lost := map[string]net.Conn{}
	for _, a := range farAddrs {
		lost[a.String()], _ = r.connect(t, a)
	}
	r.replaceFar(t)
	near, far := r.connect(t, farAddrs[0])
	for a, c := range lost {
		c.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%s: %v before anybody asked", a, err)
		}
	}
	if n := r.local.Challenge(); n != 3 {
		t.Errorf("%d connections, want 3", n)
	}
	for a, c := range lost {
		c.SetReadDeadline(time.Now().Add(3 * time.Second))
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("%s: %v, want a reset", a, err)
		}
	}
	transfer(t, near, far, 1<<20)
	near, far = r.connect(t, farAddrs[1])
	r.local.Challenge()
	transfer(t, far, near, 1<<20)
}
