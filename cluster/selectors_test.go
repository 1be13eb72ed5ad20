package cluster

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/culvert-dev/culvert/daemon/api"
)

func TestParseSelectors(t *testing.T) {
	prefixes, hosts, err := ParseSelectors([]string{"10.1.2.3/16, 192.168.1.7", "fd00::1/64,db.Corp.example.", "::ffff:10.9.0.0/112", ""})
	if err != nil {
		t.Fatal(err)
	}
	if got := fmt.Sprint(prefixes); got != "[10.1.0.0/16 192.168.1.7/32 fd00::/64 10.9.0.0/16]" {
		t.Error(got)
	}
	if got := fmt.Sprint(hosts); got != "[db.corp.example]" {
		t.Error(got)
	}
	for _, bad := range []string{"0.0.0.0/0", "::/0", "10.0.0.0/33", "10.1.2", "10.1.2.300", "10.0.0.0/8/8", "fe80::1%eth0", "0.0.0.0", "a b", "-x.y", "::ffff:0.0.0.0/96", "http://x"} {
		_, _, err := ParseSelectors([]string{"10.0.0.1", bad})
		var e *api.Error
		if !errors.As(err, &e) || e.Code != api.CodeUsage || !strings.Contains(e.Message, bad) {
			t.Errorf("%q: %v", bad, err)
		}
	}
}
