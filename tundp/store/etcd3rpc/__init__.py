"""Messages of etcd's v3 API, generated from tundp_etcd3.proto beside it."""
