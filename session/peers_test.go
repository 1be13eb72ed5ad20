package session

import (
	"errors"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/culvert-dev/culvert/daemon/api"
	"github.com/culvert-dev/culvert/wire/peer"
)

func prefixes(texts ...string) (ps []netip.Prefix) {
	for _, t := range texts {
		ps = append(ps, netip.MustParsePrefix(t))
	}
	return ps
}

func TestCut(t *testing.T) {
	for _, tt := range []struct{ in, holes, want []netip.Prefix }{
		{prefixes("10.0.0.0/24"), nil, prefixes("10.0.0.0/24")},
		{prefixes("10.0.0.0/30"), prefixes("10.0.0.1/32"), prefixes("10.0.0.0/32", "10.0.0.2/31")},
		{prefixes("10.0.0.0/24", "10.1.0.0/16"), prefixes("10.0.0.0/8"), nil},
		{prefixes("10.0.0.0/24"), prefixes("10.0.0.0/24"), nil},
		{prefixes("10.0.1.0/24", "10.0.0.0/16", "10.0.0.0/24", "10.0.0.0/16"), nil, prefixes("10.0.0.0/16")},
		{prefixes("fd00::/126"), prefixes("fd00::3/128", "10.0.0.1/32"), prefixes("fd00::/127", "fd00::2/128")},
		{prefixes("10.0.0.9/24"), prefixes("10.0.0.128/25"), prefixes("10.0.0.0/25")},
	} {
		if got := cut(tt.in, tt.holes); !slices.Equal(got, tt.want) {
			t.Errorf("%v without %v is %v, want %v", tt.in, tt.holes, got, tt.want)
		}
	}
	// A single address out of a wide range: all others stay, and it is not there.
	hole := netip.MustParsePrefix("10.244.2.6/32")
	left := cut(prefixes("10.244.0.0/16"), []netip.Prefix{hole})
	if len(left) != 16 {
		t.Errorf("%d pieces, want 16: %v", len(left), left)
	}
	for _, a := range []string{"10.244.0.0", "10.244.2.5", "10.244.2.7", "10.244.255.255", "10.244.2.6"} {
		in := slices.ContainsFunc(left, func(p netip.Prefix) bool { return p.Contains(netip.MustParseAddr(a)) })
		if in != (a != "10.244.2.6") {
			t.Errorf("%s is in it: %v", a, in)
		}
	}
}

func TestPickPeerRanges(t *testing.T) {
	busy := prefixes("198.18.0.0/15", "10.0.0.0/8", "172.16.0.0/13", "fd00::/9")
	for range 200 {
		picked, err := pickPeerRanges(busy)
		if err != nil {
			t.Fatal(err)
		}
		if len(picked) != 2 || !netip.MustParsePrefix("172.24.0.0/13").Overlaps(picked[0]) || !netip.MustParsePrefix("fd80::/9").Overlaps(picked[1]) {
			t.Fatalf("picked %v", picked)
		}
		for _, p := range picked {
			if p != p.Masked() || p.Addr().BitLen()-p.Bits() < 4 {
				t.Fatalf("%v is no range for peers", p)
			}
		}
	}
	if picked, err := pickPeerRanges(nil); err != nil || !netip.MustParsePrefix("198.18.0.0/15").Overlaps(picked[0]) {
		t.Errorf("with nothing in the way: %v, %v", picked, err)
	}
	var e *api.Error
	if _, err := pickPeerRanges(prefixes("0.0.0.0/1", "128.0.0.0/1")); !errors.As(err, &e) || e.Code != api.CodeConflict {
		t.Errorf("nothing is free: %v", err)
	}
}

func TestParseEndpoint(t *testing.T) {
	st := peer.State{Port: 51820, PodIPs: []netip.Addr{netip.MustParseAddr("fd00::5"), netip.MustParseAddr("10.0.0.5")}}
	for in, want := range map[string]string{
		"":                       "10.0.0.5:51820",
		"vpn.example.com":        "vpn.example.com:51820",
		"vpn.example.com:31820":  "vpn.example.com:31820",
		"192.0.2.1":              "192.0.2.1:51820",
		"192.0.2.1:1":            "192.0.2.1:1",
		"2001:db8::1":            "[2001:db8::1]:51820",
		"[2001:db8::1]":          "[2001:db8::1]:51820",
		"[2001:db8::1]:7":        "[2001:db8::1]:7",
		"host:":                  "",
		"host:0":                 "",
		"host:99999":             "",
		"host:x:y":               "",
		":51820":                 "",
		"a b":                    "",
		"x\nPostUp = rm":         "",
		strings.Repeat("x", 254): "",
	} {
		e, err := parseEndpoint(in)
		var bad *api.Error
		switch {
		case want == "" && (!errors.As(err, &bad) || bad.Code != api.CodeUsage || bad.Hint == ""):
			t.Errorf("%q: %v, %v, want a usage error", in, e, err)
		case want != "" && (err != nil || e.text(st) != want):
			t.Errorf("%q is %q, %v, want %q", in, e.text(st), err, want)
		}
	}
}

func TestEndpointAtNode(t *testing.T) {
	at := []netip.AddrPort{netip.MustParseAddrPort("172.30.0.12:31000"), netip.MustParseAddrPort("203.0.113.7:31000")}
	for in, want := range map[string]string{"": "203.0.113.7:31000", "home.example.com": "home.example.com:31000"} {
		e, err := parseEndpoint(in)
		if err == nil {
			err = e.atNode(at)
		}
		if got := e.text(peer.State{Port: 51820}); err != nil || got != want {
			t.Errorf("%q is %q, %v, want %q", in, got, err, want)
		}
	}
	var e endpoint
	if err := e.atNode(at[:1]); err != nil || e.text(peer.State{}) != "172.30.0.12:31000" {
		t.Errorf("a private node: %+v, %v", e, err)
	}
	if err := e.atNode(nil); err == nil {
		t.Error("no node is one")
	}
}

func TestForgetOldest(t *testing.T) {
	var list []knownPeer
	for i := range maxKnownPeers + 3 {
		instance := "old"
		if i%2 == 0 {
			instance = "now"
		}
		list = append(list, knownPeer{Name: string(rune('a' + i)), Instance: instance})
	}
	kept := forgetOldest(list, "now")
	if len(kept) != maxKnownPeers {
		t.Fatalf("%d are kept", len(kept))
	}
	if n := len(slices.DeleteFunc(kept, func(k knownPeer) bool { return k.Instance == "old" })); n != (maxKnownPeers+4)/2 {
		t.Errorf("%d of this agent are kept", n)
	}
}

// TestPeersBeforeConnect: a session that is not connected says so.
func TestPeersBeforeConnect(t *testing.T) {
	s := newSession(nil)
	s.status.st.State = api.Connecting
	var e *api.Error
	if _, err := s.addPeer(t.Context(), api.PeerRequest{Name: "phone"}); !errors.As(err, &e) || e.Code != api.CodeAgent || !strings.Contains(e.Message, "connecting") {
		t.Errorf("add: %v", err)
	}
	if _, _, err := s.handlePeers(t.Context(), nil, nil); !errors.As(err, &e) || e.Hint == "" {
		t.Errorf("list: %v", err)
	}
}
