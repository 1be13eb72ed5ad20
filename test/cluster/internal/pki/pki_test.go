package pki

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"testing"
	"time"
)

func parse(t *testing.T, p Pair) *x509.Certificate {
	t.Helper()
	pair, err := tls.X509KeyPair(p.Cert, p.Key)
	if err != nil {
		t.Fatal(err)
	}
	c, err := x509.ParseCertificate(pair.Certificate[0])
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestIssue(t *testing.T) {
	ca, err := NewAuthority("ca")
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(ca.Cert)
	p, err := ca.Issue(Request{CommonName: "dev", Organizations: []string{"developers"}, Hosts: []string{"10.0.0.1", "fd00::1", "api.test"}})
	if err != nil {
		t.Fatal(err)
	}
	c := parse(t, p)
	for _, h := range []string{"10.0.0.1", "fd00::1", "api.test"} {
		if _, err := c.Verify(x509.VerifyOptions{Roots: roots, DNSName: h}); err != nil {
			t.Errorf("%s: %v", h, err)
		}
	}
	if c.Subject.CommonName != "dev" || c.Subject.Organization[0] != "developers" {
		t.Errorf("subject %v", c.Subject)
	}
}

func TestExpired(t *testing.T) {
	ca, err := NewAuthority("ca")
	if err != nil {
		t.Fatal(err)
	}
	p, err := ca.Issue(Request{CommonName: "late", Expired: true})
	if err != nil {
		t.Fatal(err)
	}
	c := parse(t, p)
	if !c.NotAfter.Before(time.Now()) || !c.NotBefore.Before(c.NotAfter) {
		t.Errorf("valid from %v to %v", c.NotBefore, c.NotAfter)
	}
}

func TestKubeconfig(t *testing.T) {
	for _, k := range []Kubeconfig{
		{Server: "https://x:6443", CA: []byte("ca"), Context: "ctx", User: "u", Namespace: "demo", Client: Pair{[]byte("c"), []byte("k")}},
		{Server: "https://x:6443", CA: []byte("ca"), Context: "ctx", User: "u", Plugin: "/p"},
	} {
		b, err := k.Encode()
		if err != nil {
			t.Fatal(err)
		}
		var got struct {
			Users []struct {
				User struct {
					Cert []byte `json:"client-certificate-data"`
					Exec *struct{ Command string }
				}
			}
			Current string `json:"current-context"`
		}
		if err := json.Unmarshal(b, &got); err != nil {
			t.Fatal(err)
		}
		if got.Current != "ctx" {
			t.Errorf("current context %q", got.Current)
		}
		u := got.Users[0].User
		if k.Plugin == "" && string(u.Cert) != "c" {
			t.Errorf("certificate %q", u.Cert)
		}
		if k.Plugin != "" && (u.Exec == nil || u.Exec.Command != "/p" || len(u.Cert) > 0) {
			t.Errorf("exec %+v, certificate %q", u.Exec, u.Cert)
		}
	}
}
