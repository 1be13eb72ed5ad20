package wire

import (
	"bufio"
	"encoding/binary"
	"encoding/hex"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/culvert-dev/culvert/tun"
)

// OpenFlows lists the connected sockets of this machine that are bound to one of
// the addresses, from /proc/net (proc(5)), which anybody may read. A restarted
// session seeds its filter with them: a download whose far end alone sends would
// otherwise wait for ever, since the kernel answers only what it gets. Where
// there is no such file there is nothing to list.
func OpenFlows(own []netip.Addr) []Flow { return openFlows("/proc/net", own) }

func openFlows(dir string, own []netip.Addr) []Flow {
	var flows []Flow
	for _, f := range []struct {
		name  string
		proto uint8
	}{{"tcp", tun.ProtoTCP}, {"tcp6", tun.ProtoTCP}, {"udp", tun.ProtoUDP}, {"udp6", tun.ProtoUDP}} {
		file, err := os.Open(filepath.Join(dir, f.name))
		if err != nil {
			continue
		}
		for s := bufio.NewScanner(file); s.Scan() && len(flows) < maxFlows; {
			fields := strings.Fields(s.Text())
			const listening, timeWait = "0A", "06"
			if len(fields) < 4 || f.proto == tun.ProtoTCP && (fields[3] == listening || fields[3] == timeWait) {
				continue
			}
			local, ok1 := procAddr(fields[1])
			remote, ok2 := procAddr(fields[2])
			if !ok1 || !ok2 || remote.Port() == 0 {
				continue
			}
			for _, a := range own {
				if local.Addr() == a {
					flows = append(flows, Flow{Proto: f.proto, Local: local, Remote: remote})
				}
			}
		}
		file.Close()
	}
	return flows
}

// procAddr reads "0100007F:1F90": 32-bit words in the machine's byte order.
func procAddr(s string) (netip.AddrPort, bool) {
	a, p, _ := strings.Cut(s, ":")
	b, err := hex.DecodeString(a)
	port, err2 := strconv.ParseUint(p, 16, 16)
	if err != nil || err2 != nil || len(b)%4 != 0 {
		return netip.AddrPort{}, false
	}
	for i := 0; i < len(b); i += 4 {
		binary.NativeEndian.PutUint32(b[i:], binary.BigEndian.Uint32(b[i:]))
	}
	addr, ok := netip.AddrFromSlice(b)
	return netip.AddrPortFrom(addr.Unmap(), uint16(port)), ok
}
