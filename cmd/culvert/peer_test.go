package main

import (
	"bytes"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/boombuler/barcode/qr"

	"github.com/culvert-dev/culvert/daemon/api"
)

func peerExample() api.PeerConfig {
	return api.PeerConfig{
		Name: "phone", Context: "staging", Agent: "dev/culvert-agent-1",
		PrivateKey: "cHJpdmF0ZQ==", PublicKey: "cHVibGlj", ServerKey: "c2VydmVy",
		Addresses:  []netip.Addr{netip.MustParseAddr("198.18.0.2"), netip.MustParseAddr("fd00::2")},
		DNS:        []netip.Addr{netip.MustParseAddr("198.18.0.1")},
		Search:     []string{"dev.svc.cluster.local", "cluster.local"},
		MTU:        1420,
		Endpoint:   "10.0.0.5:51820",
		AllowedIPs: []netip.Prefix{netip.MustParsePrefix("10.96.0.0/16"), netip.MustParsePrefix("198.18.0.1/32")},
	}
}

func TestPeerText(t *testing.T) {
	want := `# Peer phone of staging.
# It works as long as the agent pod dev/culvert-agent-1 lives.
[Interface]
PrivateKey = cHJpdmF0ZQ==
Address = 198.18.0.2/32, fd00::2/128
DNS = 198.18.0.1, dev.svc.cluster.local, cluster.local
MTU = 1420

[Peer]
PublicKey = c2VydmVy
AllowedIPs = 10.96.0.0/16, 198.18.0.1/32
Endpoint = 10.0.0.5:51820
PersistentKeepalive = 25
`
	c := peerExample()
	if got := peerText(c); got != want {
		t.Errorf("got:\n%s\nwant:\n%s", got, want)
	}
	c.PrivateKey = ""
	if got := peerText(c); strings.Contains(got, "\nPrivateKey") || !strings.Contains(got, "# PrivateKey = the one whose public key is cHVibGlj\n") {
		t.Errorf("without a private key:\n%s", got)
	}
	// wg-quick runs PostUp as root: no text may add a line.
	evil := "x\nPostUp = rm"
	c = peerExample()
	c.Name, c.Context, c.Agent, c.PrivateKey, c.ServerKey, c.Endpoint, c.Search = evil, evil, evil, evil, evil, evil, []string{evil}
	if got := peerText(c); strings.Count(got, "\n") != strings.Count(want, "\n") || strings.Contains(got, "\nPostUp") {
		t.Errorf("lines were added:\n%s", got)
	}
}

// TestPrintQR reads the drawing back and compares it with the code.
func TestPrintQR(t *testing.T) {
	text := peerText(peerExample())
	var b bytes.Buffer
	if err := printQR(&b, text); err != nil {
		t.Fatal(err)
	}
	code, err := qr.Encode(text, qr.L, qr.Unicode)
	if err != nil {
		t.Fatal(err)
	}
	var drawn [][]bool
	for line := range strings.Lines(b.String()) {
		line = strings.TrimSuffix(strings.TrimPrefix(line, "\x1b[30;107m"), "\x1b[0m\n")
		var up, down []bool
		for _, c := range line {
			up, down = append(up, c == '█' || c == '▀'), append(down, c == '█' || c == '▄')
		}
		drawn = append(drawn, up, down)
	}
	size := code.Bounds().Dx()
	if len(drawn) < size+2*quietZone || len(drawn[0]) != size+2*quietZone {
		t.Fatalf("%d by %d modules are drawn, want %d", len(drawn[0]), len(drawn), size+2*quietZone)
	}
	for y := range drawn {
		for x := range drawn[y] {
			want := false
			if cx, cy := x-quietZone, y-quietZone; cx >= 0 && cy >= 0 && cx < size && cy < size {
				r, _, _, _ := code.At(cx, cy).RGBA()
				want = r == 0
			}
			if drawn[y][x] != want {
				t.Fatalf("module %d,%d is dark: %v", x, y, drawn[y][x])
			}
		}
	}
	err = printQR(&b, strings.Repeat("10.0.0.0/8, ", 500))
	if e := asError(err); err == nil || e.Hint == "" || !strings.Contains(e.Message, "too long") {
		t.Errorf("too much for a code: %v", err)
	}
}

func TestPrintPeers(t *testing.T) {
	now := time.Date(2026, 11, 23, 15, 0, 0, 0, time.UTC)
	var b bytes.Buffer
	a := newApp("culvert", nil, &b, &b)
	a.printPeers(nil, now)
	a.printPeers([]api.Peer{
		{Name: "phone", Addresses: []netip.Addr{netip.MustParseAddr("198.18.0.2")}, Added: now.Add(-time.Hour), LastHandshake: now.Add(-time.Minute), From: "192.0.2.1:999", Sent: 1500, Received: 20},
		{Name: "mac", Addresses: []netip.Addr{netip.MustParseAddr("198.18.0.3")}, Added: now.Add(-time.Hour), LastHandshake: now.Add(-10 * time.Minute)},
		{Name: "old\x1b[2J", Stale: true, Added: now.Add(-2 * time.Hour)},
	}, now)
	got := b.String()
	for _, want := range []string{"`culvert peer add NAME`", "phone", "connected", "1m00s ago", "192.0.2.1:999", "1.5 kB", "away", "stale", "never"} {
		if !strings.Contains(got, want) {
			t.Errorf("%q is missing in\n%s", want, got)
		}
	}
	if strings.Contains(got, "\x1b") {
		t.Error("a name moves the cursor")
	}
	t.Log("\n" + got)
}
