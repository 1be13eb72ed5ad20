package main

import (
	"fmt"
	"io"
	"strings"

	"github.com/boombuler/barcode/qr"

	"github.com/culvert-dev/culvert/daemon/api"
)

// peerText is a peer's configuration as wg-quick(8) reads it. A line comes only
// from here: what the daemon says has none of its own, lest it add commands.
func peerText(c api.PeerConfig) string {
	var b strings.Builder
	line := func(format string, args ...any) { fmt.Fprintln(&b, printable(fmt.Sprintf(format, args...))) }
	line("# Peer %s of %s.", c.Name, c.Context)
	line("# It works as long as the agent pod %s lives.", c.Agent)
	line("[Interface]")
	if c.PrivateKey != "" {
		line("PrivateKey = %s", c.PrivateKey)
	} else {
		line("# PrivateKey = the one whose public key is %s", c.PublicKey)
	}
	var addrs []string
	for _, a := range c.Addresses {
		addrs = append(addrs, fmt.Sprintf("%s/%d", a, a.BitLen()))
	}
	line("Address = %s", strings.Join(addrs, ", "))
	line("DNS = %s", strings.Join(append(texts(c.DNS), c.Search...), ", "))
	line("MTU = %d", c.MTU)
	line("")
	line("[Peer]")
	line("PublicKey = %s", c.ServerKey)
	line("AllowedIPs = %s", strings.Join(texts(c.AllowedIPs), ", "))
	line("Endpoint = %s", c.Endpoint)
	// Through NAT and firewalls the agent reaches the peer only while it speaks.
	line("PersistentKeepalive = 25")
	return b.String()
}

func texts[T fmt.Stringer](list []T) []string {
	all := make([]string, 0, len(list))
	for _, v := range list {
		all = append(all, v.String())
	}
	return all
}

// quietZone is the margin that readers of QR codes need, in modules; the standard
// wants 4, and all readers take 2.
const quietZone = 2

// printQR draws text as a QR code, two modules above each other in a character.
// It paints both colours, so that it is readable on light and dark terminals.
func printQR(w io.Writer, text string) error {
	code, err := qr.Encode(text, qr.L, qr.Unicode)
	if err != nil {
		return &api.Error{Code: api.CodeUnsupported,
			Message: fmt.Sprintf("the configuration is too long for a QR code (%d bytes): it lists many ranges", len(text)), Hint: "use the text above"}
	}
	size := code.Bounds().Dx()
	dark := func(x, y int) bool {
		if x < 0 || y < 0 || x >= size || y >= size {
			return false
		}
		r, _, _, _ := code.At(x, y).RGBA()
		return r == 0
	}
	var b strings.Builder
	for y := -quietZone; y < size+quietZone; y += 2 {
		b.WriteString("\x1b[30;107m") // black on bright white
		for x := -quietZone; x < size+quietZone; x++ {
			switch up, down := dark(x, y), dark(x, y+1); {
			case up && down:
				b.WriteRune('█')
			case up:
				b.WriteRune('▀')
			case down:
				b.WriteRune('▄')
			default:
				b.WriteByte(' ')
			}
		}
		b.WriteString("\x1b[0m\n")
	}
	_, err = io.WriteString(w, b.String())
	return err
}
