package cluster

import (
	"testing"

	"github.com/culvert-dev/culvert/daemon/api"
)

func TestCheckPreview(t *testing.T) {
	for _, c := range []struct{ name, host, says string }{
		{"tomcat-v2", "", ""},
		{"tomcat-v2", "tomcat.example.com", ""},
		{"Cart_2", "", `"Cart_2" is no name for a Service`},
		{"2cart", "", `"2cart"`},
		{"cart.shop", "", `"cart.shop"`},
		{"", "", `""`},
		{"cart", "*.example.com", `--host "*.example.com"`},
		{"cart", "http://x", `--host "http://x"`},
	} {
		err := CheckPreview(c.name, c.host)
		if c.says != "" {
			wantError(t, err, api.CodeUsage, c.says)
		} else if err != nil {
			t.Errorf("%s, host %q: %v", c.name, c.host, err)
		}
	}
}
